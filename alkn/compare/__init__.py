"""``alkn compare``: methods side by side over a benchmark's chain and several seeds.

``config`` says what is compared, ``cell`` makes one (method, seed), ``final`` what is measured after its
chain, ``results`` reads what was made and puts it together, ``report`` and ``plots`` show it.
"""
