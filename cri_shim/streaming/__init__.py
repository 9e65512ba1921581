"""The HTTP server of exec, attach and port-forward: the edge beside `cri_shim.rpc`.

Flows get the ends of streams from here (`cri_shim.model.streams`); protocols are in `cri_shim.wire`. `server` is what
the daemon starts; it loads the rest when the first URL is given out.
"""
