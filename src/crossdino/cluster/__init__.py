"""Prediction on a Ray cluster: many images, or few of any size, on many machines.

Ray Data reads the images on any node, cuts them, and sends blocks of tiles through a pool of actors with one model
each. An image whose tiles are all in one block is merged by the actor that saw it; the parts of a larger one are
merged where the run was started. So nothing is shuffled between the nodes: a `groupby` would have to wait for the last
image before it could give the first, and a stopped run would have nothing to show.

What a tile gives does not depend on who computes it or when: which tiles go through the network together follows from
the list of sources and the settings alone. With `batch_size` 1 the results are those of one process with as many
threads, bit for bit. Ray restarts actors that die and repeats what they had begun; parts that come twice are counted
once.
"""

from __future__ import annotations

from crossdino.cluster.connection import RayOptions
from crossdino.cluster.run import predict_on_ray, work_on_ray

__all__ = ["RayOptions", "predict_on_ray", "work_on_ray"]
