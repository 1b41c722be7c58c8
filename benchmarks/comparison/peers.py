"""Peers of this comparison, which files of results name as classes of this module."""

from leanstep.optimizers.peers import SCALE, NorMuon

__all__ = ["SCALE", "NorMuon"]
