"""Wasm modules by wasmtime, in threads of the daemon or in processes of their own. A folder per runtime kind.

Its face is `handlers.wasmtime.kind`. Invariant: importing the package loads nothing, and importing the worker loads
neither the event loop nor the messages of the CRI: whatever a zygote has loaded, each of its workers pays for.
"""
