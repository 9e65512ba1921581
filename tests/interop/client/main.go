// The streaming clients of Kubernetes against a CRI socket: k8s.io/cri-client asks for the URL, client-go goes there.
//
// Every command prints one JSON object per event on standard output; the tests read them. Nothing of the protocols is
// made here, and nothing is retried.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	internalapi "k8s.io/cri-api/pkg/apis"
	cri "k8s.io/cri-client/pkg"
)

type options struct {
	endpoint, transport, url     string
	container, pod, sizes, input string
	stdin, stdout, stderr, tty   bool
	count, bytes, rate           int
	ports                        string
	hold                         time.Duration
}

var commands = map[string]func(context.Context, *options, []string) error{
	"exec":    execute,
	"attach":  attach,
	"forward": forward,
	"load":    load,
	"drain":   drain,
}

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: interop exec|attach|forward|load|drain [FLAG]... [COMMAND ARGUMENT...]")
		os.Exit(2)
	}
	var o options
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	flags.StringVar(&o.endpoint, "endpoint", "", "the CRI socket, unix:///...")
	flags.StringVar(&o.transport, "transport", "spdy", "spdy or websocket")
	flags.StringVar(&o.url, "url", "", "go there instead of asking for a URL")
	flags.StringVar(&o.container, "container", "", "container id")
	flags.StringVar(&o.pod, "pod", "", "pod sandbox id")
	flags.StringVar(&o.input, "input", "", "standard input: a file; empty = this program's")
	flags.BoolVar(&o.stdin, "stdin", false, "")
	flags.BoolVar(&o.stdout, "stdout", true, "")
	flags.BoolVar(&o.stderr, "stderr", false, "")
	flags.BoolVar(&o.tty, "tty", false, "")
	flags.StringVar(&o.sizes, "sizes", "", "of the terminal: WIDTHxHEIGHT,...; a further one at each SIGWINCH")
	flags.IntVar(&o.count, "count", 100, "sessions at once")
	flags.IntVar(&o.bytes, "bytes", 1<<20, "each way in each session")
	flags.StringVar(&o.ports, "ports", "", "LOCAL:REMOTE,...; 0 = any local port")
	flags.DurationVar(&o.hold, "hold", 0, "drain: read slowly for so long")
	flags.IntVar(&o.rate, "rate", 1<<20, "drain: bytes in a second then")
	_ = flags.Parse(os.Args[2:])
	if err := commands[os.Args[1]](context.Background(), &o, flags.Args()); err != nil {
		report(map[string]any{"event": "end", "exit": -1, "error": err.Error()})
	}
}

var reporting sync.Mutex

func report(event map[string]any) {
	reporting.Lock()
	defer reporting.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(event)
}

func service(ctx context.Context, o *options) (internalapi.RuntimeService, error) {
	return cri.NewRemoteRuntimeService(ctx, o.endpoint, 60*time.Second, nil, false)
}

func executor(o *options, url string) (remotecommand.Executor, error) {
	config := &restclient.Config{TLSClientConfig: restclient.TLSClientConfig{Insecure: true}}
	if o.transport == "websocket" {
		return remotecommand.NewWebSocketExecutor(config, "GET", url)
	}
	return remotecommand.NewSPDYExecutor(config, "POST", parse(url))
}

// Run one session and report its end: the exit status, -1 for an error that is none.
func stream(ctx context.Context, o *options, url string) error {
	client, err := executor(o, url)
	if err != nil {
		return err
	}
	streams := remotecommand.StreamOptions{Tty: o.tty}
	if o.stdin {
		streams.Stdin = os.Stdin
		if o.input != "" {
			file, err := os.Open(o.input)
			if err != nil {
				return err
			}
			defer file.Close()
			streams.Stdin = file
		}
	}
	if o.stdout {
		streams.Stdout = shown("stdout")
	}
	if o.stderr {
		streams.Stderr = shown("stderr")
	}
	if o.sizes != "" {
		streams.TerminalSizeQueue = newSizes(o.sizes)
	}
	err = client.StreamWithContext(ctx, streams)
	var status utilexec.CodeExitError
	switch {
	case err == nil:
		report(map[string]any{"event": "end", "exit": 0, "error": ""})
	case errors.As(err, &status):
		report(map[string]any{"event": "end", "exit": status.Code, "error": err.Error()})
	default:
		return err
	}
	return nil
}

// What has arrived on the stream of this name, as events of base64.
type shown string

func (s shown) Write(data []byte) (int, error) {
	report(map[string]any{"event": string(s), "data": data})
	return len(data), nil
}

type sizes struct {
	changes chan os.Signal
	rest    []string
}

func newSizes(text string) *sizes {
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, syscall.SIGWINCH)
	changes <- syscall.SIGWINCH // the first size is wanted at once
	return &sizes{changes, strings.Split(text, ",")}
}

// The next size when the terminal has changed; after the last one nothing for as long as the session lasts.
func (s *sizes) Next() *remotecommand.TerminalSize {
	if len(s.rest) == 0 {
		select {}
	}
	<-s.changes
	var size remotecommand.TerminalSize
	_, _ = fmt.Sscanf(s.rest[0], "%dx%d", &size.Width, &size.Height)
	s.rest = s.rest[1:]
	return &size
}

type counted struct {
	io.Writer
	bytes int
}

func (c *counted) Write(data []byte) (int, error) {
	c.bytes += len(data)
	return c.Writer.Write(data)
}
