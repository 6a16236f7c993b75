"""The process: command line, configuration, lifecycle, training loop, observability."""
