"""``alkn compare``: methods side by side over a benchmark's chain and several seeds.

``config`` says what is compared, ``cell`` makes one (method, seed), ``final`` what is measured after its
chain, ``made`` by what, when and where, ``results`` reads what was made and puts it together, ``record`` keeps it
beside a page, ``report``, ``page`` and ``plots`` show it.
"""
