"""The class of ``optimizer.name: muon``, under the path by which files of results name it."""

from leanstep.optimizers.peers import MuonAdamW as MuonAdamW
