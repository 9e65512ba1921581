"""Things with state or remote peers: store, registry, CNI, monitors, overlay."""
