"""The paper's architectures, as plain modules, and a registry that builds them by name."""

from models.densenet import DenseNet121
from models.lenet import LeNet
from models.logreg import LogReg
from models.registry import build_model, canonical_name, paper_name
from models.resnet import ResNet18
from models.vgg import VGG11, VGG11_bn

__all__ = [
    "VGG11",
    "DenseNet121",
    "LeNet",
    "LogReg",
    "ResNet18",
    "VGG11_bn",
    "build_model",
    "canonical_name",
    "paper_name",
]
