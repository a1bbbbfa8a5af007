"""Where a tree leaves from: one outgoing migration, and the calls about all of them."""
