"""An island: one peer that is several processes on one machine, one for each of its GPUs, say.

    leader: the peer, as everywhere else              members: a model each, and nothing else
        order: batch, what has changed   --pipe-->
        weights                          ==broadcast==>    forward, backward
        mean of gradients                <==reduce==
        rows for others' experts         <--pipe--

Gradients are merged in every step, so an island of N is a peer with N times the batch. Only the leader has optimizer
states, stand-ins to publish, text and a network, and only it is a peer: members hold what a forward takes, are told of
everything that changes, and can be lost at any time. Then the leader goes on alone, and starts them anew after a while.

Orders and rows go through pipes, weights and gradients through torch.distributed: gloo on CPUs, NCCL between GPUs.
"""
