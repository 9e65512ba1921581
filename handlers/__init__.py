"""The runtime kinds: one module or package each, loaded only if the configuration names it.

To write one, offer three names:

- `KIND`: the `cri_shim.model.handler.Kind` of what it runs.
- `OPTIONS`: a frozen `msgspec.Struct` with `kind: str` and the settings of the kind. It is the schema of the entry
  below `handlers:`; unknown keys and bad values are refused before anything is made.
- `make(name, options, context) -> Handler`: builds an object with the verbs of `cri_shim.model.handler.Handler`.
  `name` is the one in the configuration, `context` (`cri_shim.adapters.context.HandlerContext`) what the daemon lends:
  the directory layout, the cgroups, the zygote, the daemon's limits, and `exited`, to be called exactly once when a
  started container has ended. `make` waits for nothing: what
  takes time is in the handler's `probe`.

`kind: NAME` is the module `handlers.NAME`; one outside of this tree is an entry point `NAME` of the group
`cri_shim.handlers`. What a handler promises is in the docstrings of the protocol, and `tests/contract/handler_suite.py`
holds every handler against them: point it at the new one.

Handlers stand beside each other: none imports another, all import `cri_shim` downwards of `flows`.
"""
