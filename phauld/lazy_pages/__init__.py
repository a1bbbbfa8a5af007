"""Pages that come after the tree: the relays of a post-copy, and images that are read late."""
