package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"net/url"
	"sync"
	"time"

	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func parse(text string) *url.URL {
	parsed, err := url.Parse(text)
	if err != nil {
		panic(err)
	}
	return parsed
}

func execute(ctx context.Context, o *options, command []string) error {
	address, err := execURL(ctx, o, command)
	if err != nil {
		return err
	}
	report(map[string]any{"event": "url", "url": address})
	return stream(ctx, o, address)
}

func execURL(ctx context.Context, o *options, command []string) (string, error) {
	if o.url != "" {
		return o.url, nil
	}
	runtime, err := service(ctx, o)
	if err != nil {
		return "", err
	}
	answer, err := runtime.Exec(ctx, &runtimeapi.ExecRequest{
		ContainerId: o.container, Cmd: command, Tty: o.tty, Stdin: o.stdin, Stdout: o.stdout, Stderr: o.stderr,
	})
	if err != nil {
		return "", err
	}
	return answer.Url, nil
}

func attach(ctx context.Context, o *options, _ []string) error {
	runtime, err := service(ctx, o)
	if err != nil {
		return err
	}
	answer, err := runtime.Attach(ctx, &runtimeapi.AttachRequest{
		ContainerId: o.container, Tty: o.tty, Stdin: o.stdin, Stdout: o.stdout, Stderr: o.stderr,
	})
	if err != nil {
		return err
	}
	report(map[string]any{"event": "url", "url": answer.Url})
	return stream(ctx, o, answer.Url)
}

// Many sessions at once, each of which sends random bytes through `cat` and holds what comes back against them.
func load(ctx context.Context, o *options, command []string) error {
	o.stdin, o.stdout = true, true
	begin := time.Now()
	var group sync.WaitGroup
	failures := make(chan error, o.count)
	for range o.count {
		group.Add(1)
		go func() {
			defer group.Done()
			if err := echo(ctx, o, command); err != nil {
				failures <- err
			}
		}()
	}
	group.Wait()
	close(failures)
	var texts []string
	for err := range failures {
		texts = append(texts, err.Error())
	}
	report(map[string]any{"event": "end", "failures": texts, "seconds": time.Since(begin).Seconds()})
	return nil
}

// One session whose output is read at a rate for some time and then as fast as it comes; it is counted, not shown.
func drain(ctx context.Context, o *options, command []string) error {
	o.stdout = true
	address, err := execURL(ctx, o, command)
	if err != nil {
		return err
	}
	client, err := executor(o, address)
	if err != nil {
		return err
	}
	begin := time.Now()
	reader := &slow{rate: o.rate, until: begin.Add(o.hold)}
	if err := client.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: reader}); err != nil {
		return err
	}
	rest := time.Since(begin) - o.hold
	report(map[string]any{"event": "end", "bytes": reader.bytes, "slow": reader.slowly, "seconds": rest.Seconds()})
	return nil
}

type slow struct {
	rate, bytes, slowly int
	until               time.Time
}

func (s *slow) Write(data []byte) (int, error) {
	if time.Now().Before(s.until) {
		time.Sleep(time.Duration(len(data)) * time.Second / time.Duration(s.rate))
		s.slowly += len(data)
	}
	s.bytes += len(data)
	return len(data), nil
}

func echo(ctx context.Context, o *options, command []string) error {
	sent := make([]byte, o.bytes)
	if _, err := rand.Read(sent); err != nil {
		return err
	}
	address, err := execURL(ctx, o, command)
	if err != nil {
		return err
	}
	client, err := executor(o, address)
	if err != nil {
		return err
	}
	hash := sha256.New()
	back := &counted{Writer: hash}
	streams := remotecommand.StreamOptions{Stdin: bytes.NewReader(sent), Stdout: back}
	if err := client.StreamWithContext(ctx, streams); err != nil {
		return err
	}
	if want := sha256.Sum256(sent); !bytes.Equal(hash.Sum(nil), want[:]) {
		return fmt.Errorf("%d bytes came back for %d, and not the same", back.bytes, o.bytes)
	}
	return nil
}
