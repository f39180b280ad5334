"""`python -m benchmarks.hostile`: hostile and ordinary clients at one server, for half an hour.

Three processes share the machine: `aft serve` with keys and a store, ordinary clients, and an attacker who has a key of
his own. Each attack is named, and what the ordinary clients saw while it ran is told beside it.

    python -m benchmarks.hostile --seconds 1800 --out hostile.json
    python -m benchmarks.hostile --seconds 60 --workers 1 --only tokenize    # whose fault is it?
"""
