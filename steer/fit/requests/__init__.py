"""What one may ask of fitting and measuring: a frozen model per method, with what runs it.

A model is the only place where its method's parameters, defaults, bounds and descriptions are
written. The command line makes options of it (`steer.cli.options`), jobs and routes take it as it
is. Nothing here imports torch before something is run: `steer --help` reads these models.
"""
