"""From a folder of pictures to a configuration: its shards (`pictures`), what is chosen for them (`choices`), and the
file (`start`)."""
