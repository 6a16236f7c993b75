"""An island: one peer that is several processes on one machine, one for each of its GPUs, say.

    leader: the peer, as everywhere else              members: a model each, or a part of it
        order: batches, what has changed --pipe-->
        weights                          ======>       forward, backward
        gradients, or weights            <======
        rows for others' experts         <--pipe--

Only the leader has stand-ins to publish, text and a network, and only it is a peer: members are told of everything that
changes, and can be lost at any time. Then the leader goes on alone, and starts them anew after a while. They are forked
from a process that has imported what takes seconds (`nursery.py`). There are three forms, each with both sides in one
file:

    merging.py      a batch each in every step, and gradients merged before it is taken
    learners.py     some steps each, by optimizers of their own, and then weights averaged
    pipeline.py     some layers each, of one batch

Orders and rows go through pipes, weights, gradients and activations through torch.distributed: gloo on CPUs, NCCL
between GPUs.
"""
