// What a small program in Go is: it prints a line, here of JSON, and then it waits.
package main

import (
	"encoding/json"
	"os"
	"time"
)

func main() {
	json.NewEncoder(os.Stdout).Encode(map[string]any{"hello": "from Go", "arguments": len(os.Args)})
	time.Sleep(time.Hour)
}
