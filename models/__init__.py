"""The paper's architectures, as plain modules, and a registry that builds them by name."""

from models.registry import DenseNet121, LeNet, LogReg, ResNet18, VGG11_bn, build_model, canonical_name, paper_name

__all__ = ["DenseNet121", "LeNet", "LogReg", "ResNet18", "VGG11_bn", "build_model", "canonical_name", "paper_name"]
