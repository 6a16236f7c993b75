"""A swarm on a virtual clock: the decisions of `protocol/`, with links, failures and learning made up."""
