package main

import (
	"context"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"k8s.io/apimachinery/pkg/util/httpstream"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Forward ports until a signal comes or the connection is lost.
func forward(ctx context.Context, o *options, _ []string) error {
	address := o.url
	if address == "" {
		runtime, err := service(ctx, o)
		if err != nil {
			return err
		}
		answer, err := runtime.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: o.pod})
		if err != nil {
			return err
		}
		address = answer.Url
	}
	report(map[string]any{"event": "url", "url": address})
	dialer, err := dialer(o, address)
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(ctx, syscall.SIGTERM, os.Interrupt)
	defer cancel()
	ready := make(chan struct{})
	utilruntime.ErrorHandlers = []utilruntime.ErrorHandler{
		func(_ context.Context, err error, _ string, _ ...any) {
			report(map[string]any{"event": "said", "text": err.Error()})
		},
	}
	forwarder, err := portforward.NewOnAddressesWithContext(
		ctx, dialer, []string{"127.0.0.1"}, strings.Split(o.ports, ","), ready, nil, nil,
	)
	if err != nil {
		return err
	}
	go func() {
		select {
		case <-ready:
		case <-ctx.Done():
			return
		}
		ports, err := forwarder.GetPorts()
		if err != nil {
			return
		}
		local := map[uint16]uint16{}
		for _, port := range ports {
			local[port.Remote] = port.Local
		}
		report(map[string]any{"event": "ready", "local": local})
	}()
	if err := forwarder.ForwardPorts(); err != nil {
		return err
	}
	report(map[string]any{"event": "end", "exit": 0, "error": ""})
	return nil
}

func dialer(o *options, address string) (httpstream.Dialer, error) {
	config := &restclient.Config{TLSClientConfig: restclient.TLSClientConfig{Insecure: true}}
	if o.transport == "websocket" {
		return portforward.NewSPDYOverWebsocketDialer(parse(address), config)
	}
	transport, upgrader, err := spdy.RoundTripperFor(config)
	if err != nil {
		return nil, err
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", parse(address)), nil
}
