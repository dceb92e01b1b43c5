"""The paper's architectures, as plain modules, and a registry that builds them by name."""

from models.checks import check_model, checked
from models.densenet import DenseNet121
from models.lenet import LeNet
from models.logreg import LogReg
from models.registry import ARCHITECTURES, build_model, canonical_name, identity, paper_name
from models.resnet import ResNet18
from models.vgg import VGG11_bn

__all__ = ["DenseNet121", "LeNet", "LogReg", "ResNet18", "VGG11_bn"]
__all__ += ["ARCHITECTURES", "build_model", "canonical_name", "identity", "paper_name"]
__all__ += ["check_model", "checked"]
