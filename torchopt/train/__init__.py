"""One plain training loop and its configuration; blind to compression."""

from torchopt.train.config import SGD as SGD
from torchopt.train.config import Adam as Adam
from torchopt.train.config import AdamW as AdamW
from torchopt.train.config import Distill as Distill
from torchopt.train.config import Train as Train
from torchopt.train.evaluate import accuracy as accuracy
from torchopt.train.loop import Epoch as Epoch
from torchopt.train.loop import device_of as device_of
from torchopt.train.loop import train as train
