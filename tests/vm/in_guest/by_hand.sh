#!/bin/bash
# Pre-copy with the criu command alone, as well as a script can: what phaul is measured against in the lab.
#
#   by_hand.sh run LOG COMMAND…               start a tree that can move; prints its PID
#   by_hand.sh there DIRECTORY ROUNDS         at the destination: receive and restore; prints "ready", then "restored"
#   by_hand.sh here DIRECTORY ROUNDS PID ADDRESS
#
# Whatever can be done before the freeze is: every page server and the receiver of the images wait already. The tree stands
# still for the dump, the copy of the images (tar over TCP; a person would have to start an scp) and the restore. Lazy
# restore would not help: criu reads lazily only what the last dump itself holds, and the rounds before hold nearly all.
# Nor was it quicker with a real-time priority (256 MiB, two runs each on one processor: 4.9 and 8.1 s, without 1.9, 2.1).
set -euo pipefail

readonly PAGES_PORT=7300 IMAGES_PORT=7390
what=$1
shift

parent() { [ "$1" = 0 ] || printf -- '--prev-images-dir ../%d' $(($1 - 1)); } # of a round

case $what in
    run)
        log=$1
        shift
        : >"$log"
        # shellcheck disable=SC2016 # the inner shell expands it
        unshare --pid --fork sh -c 'log=$0; exec setsid tini -- "$@" </dev/null >"$log" 2>&1' "$log" "$@" \
            </dev/null >/dev/null 2>&1 &
        until pgrep -P $!; do sleep 0.1; done
        ;;
    there)
        directory=$1 rounds=$2
        servers=()
        for ((n = 0; n <= rounds; n++)); do
            mkdir -p "$directory/$n"
            # shellcheck disable=SC2046 # two words or none
            criu page-server --images-dir "$directory/$n" $(parent "$n") --address 0.0.0.0 \
                --port $((PAGES_PORT + n)) -o page-server.log &
            servers+=($!)
        done
        python3 -I -S -c '
import os, socket, sys
server = socket.create_server(("", int(sys.argv[1])))
print("ready", flush=True)
connection, _ = server.accept()
os.dup2(connection.fileno(), 0)
os.execvp("tar", ["tar", "-x", "-C", sys.argv[2]])' $IMAGES_PORT "$directory/$rounds"
        wait "${servers[@]}"
        criu restore --restore-detached --images-dir "$directory/$rounds" -o restore.log
        echo restored
        ;;
    here)
        directory=$1 rounds=$2 pid=$3 address=$4
        for ((n = 0; n < rounds; n++)); do
            mkdir -p "$directory/$n"
            # shellcheck disable=SC2046
            criu pre-dump --tree "$pid" --images-dir "$directory/$n" $(parent "$n") --track-mem -o dump.log \
                --page-server --address "$address" --port $((PAGES_PORT + n))
        done
        mkdir -p "$directory/$n"
        # shellcheck disable=SC2046
        criu dump --tree "$pid" --images-dir "$directory/$n" $(parent "$n") --track-mem -o dump.log \
            --page-server --address "$address" --port $((PAGES_PORT + n))
        tar -c -C "$directory/$n" --exclude parent --exclude '*.log' . >"/dev/tcp/$address/$IMAGES_PORT"
        ;;
esac
