module cri-shim.io/tests/builders

go 1.21
