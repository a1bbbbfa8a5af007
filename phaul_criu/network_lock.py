"""Removes the network lock that a successful dump leaves behind.

With the NFTABLES lock criu makes a table "inet CRIU-…" that drops the packets of the tree's TCP connections. It removes
it when the tree runs on, or when the tree is restored in the same network namespace; after a migration to another node
nobody does, and every further dump takes longer the more of these tables there are (measured: 60 ms → 250 ms with 88).
"""

from __future__ import annotations

import errno
import os

from phaul_criu import nft_messages
from phaul_criu.inventory import lock_table_name
from phaul_criu.nftables import open_netfilter, transact


def remove_network_lock(images_dir_fd: int) -> bool:
    """Remove the lock of the dump whose images lie in the directory; whether there was one.

    To be called in the network namespace of the tree (that of the dumping criu, unless the tree has its own), when the
    tree's addresses belong to the destination: from then on packets to this node are answered with a reset. Raises
    OSError if it may not be removed, or if the images have no inventory; ValueError if that is damaged.
    """
    with open(os.open("inventory.img", os.O_RDONLY | os.O_CLOEXEC, dir_fd=images_dir_fd), "rb") as file:
        name = lock_table_name(file.read())
    if name is None:
        return False
    with open_netfilter() as netlink:
        try:
            transact(netlink, [nft_messages.delete_table(name)], f"cannot delete nftables table inet {name}")
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                raise
            return False
    return True
