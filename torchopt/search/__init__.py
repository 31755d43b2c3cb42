"""What each layer may become, what that costs, and which choice for all of them together meets a budget."""

from torchopt.search.choices import Choices as Choices
from torchopt.search.choices import Option as Option
from torchopt.search.composed import Point as Point
from torchopt.search.layers.table import Sensitivity as Sensitivity
from torchopt.search.result import SearchResult as SearchResult
from torchopt.search.sensitivity import sensitivity as sensitivity
