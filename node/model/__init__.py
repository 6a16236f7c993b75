"""The model: a transformers backbone whose experts are replaced by shards of owned experts and stand-ins."""
