"""Data sets in memory: what stands under `data:` in a recipe, and the batches that training draws from it."""

from torchopt.data.dataset import Augment as Augment
from torchopt.data.dataset import Dataset as Dataset
from torchopt.data.dataset import epoch_order as epoch_order
from torchopt.data.dataset import generator as generator
from torchopt.data.fingerprint import changed as changed
from torchopt.data.fingerprint import fingerprint as fingerprint
from torchopt.data.given import read_batches as read_batches
from torchopt.data.inputs import read_inputs as read_inputs
from torchopt.data.preprocess import Preprocess as Preprocess
from torchopt.data.samples import Given as Given
from torchopt.data.sources import Digits as Digits
from torchopt.data.sources import FashionMnist as FashionMnist
from torchopt.data.sources import ImageFolder as ImageFolder
from torchopt.data.sources import ImportedData as ImportedData
from torchopt.data.sources import SpokenDigits as SpokenDigits
