"""``alkn compare``: methods side by side over a benchmark's chain and several seeds.

``config`` says what is compared, ``cell`` makes one (method, seed), ``final`` what is measured after its
chain, ``record`` what lets its numbers count elsewhere, ``results`` reads what was made, here or on record, and puts
it together, ``report``, ``page`` and ``plots`` show it.
"""
