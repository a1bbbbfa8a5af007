"""A process with memory: `dirtier.py TOTAL_MIB WARM_MIB` fills it, then writes to the first part every 0.1 s.

It counts its rounds in the first eight bytes and into the file named by its third argument.
"""

import sys
import time

MIB = 1 << 20
total_mib, warm_mib, count_path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
memory = bytearray(total_mib * MIB)
for offset in range(0, len(memory), 4096):
    memory[offset + 8] = offset // 4096 % 251 + 1

count = 0
while True:
    count += 1
    memory[:8] = count.to_bytes(8, "little")
    for offset in range(0, warm_mib * MIB, 4096):
        memory[offset + 9] = count % 256
    if any(memory[offset + 8] != offset // 4096 % 251 + 1 for offset in range(0, len(memory), 64 * 4096)):
        sys.exit("memory was damaged")
    with open(count_path, "w") as file:
        file.write(f"{count}\n")
    time.sleep(0.1)
