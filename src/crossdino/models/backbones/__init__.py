"""Backbones: any timm feature extractor, and Strip-MLP with CLAP (the paper's appendix)."""

from crossdino.models.backbones.factory import Backbone, build_backbone
from crossdino.models.backbones.strip_mlp import StripMLPBackbone, StripMLPClassifier

__all__ = ["Backbone", "StripMLPBackbone", "StripMLPClassifier", "build_backbone"]
