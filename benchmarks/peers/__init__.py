"""Our speed and memory beside those of TRL, Tunix, EasyDeL and a hand-written torch loop, on the same machine.

    make bench                             ours alone, with the floor of the machine beside each figure
    make bench-peers                       all of them, one process at a time; then our ratio to the best peer

Runners (`run_*.py`) are processes of their own, each in its project's environment: task in, one line of JSON out.
"""
