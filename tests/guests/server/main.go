// A web server on the listener that it is given: WASI preview 1 has no listen.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	file := os.NewFile(3, "listener")
	listener, err := net.FileListener(file)
	if err != nil {
		fmt.Println("listener:", err)
		os.Exit(2)
	}
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello "+r.URL.Path+"\n") })
	http.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Write(body)
	})
	http.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		data, err := os.ReadFile(r.URL.Query().Get("name"))
		if err != nil {
			http.Error(w, err.Error(), 404)
			return
		}
		w.Write(data)
	})
	http.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, strings.Join(os.Environ(), "\n")+"\n")
	})
	http.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begun\n")
		w.(http.Flusher).Flush()
		time.Sleep(300 * time.Millisecond)
		io.WriteString(w, "done\n")
	})
	fmt.Println("serving")
	server := &http.Server{}
	fmt.Println("served:", server.Serve(listener))
	server.Shutdown(context.Background()) // lets the requests under way finish
	fmt.Println("bye")
}
