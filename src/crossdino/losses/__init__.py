"""Matching and losses: Hungarian matcher, Boost and focal classification loss, L1, GIoU (Section III-D, and DINO)."""

from crossdino.losses.boost import boost_loss, boost_weight, focal_loss
from crossdino.losses.criterion import Criterion
from crossdino.losses.matcher import Match, match_layers

__all__ = ["Criterion", "Match", "boost_loss", "boost_weight", "focal_loss", "match_layers"]
