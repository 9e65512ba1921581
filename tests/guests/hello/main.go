// What a small program in Go is: it prints a line, here of JSON, and then it waits, or ends if it has an argument.
package main

import (
	"encoding/json"
	"os"
	"time"
)

func main() {
	json.NewEncoder(os.Stdout).Encode(map[string]any{"hello": "from Go", "arguments": len(os.Args)})
	if len(os.Args) == 1 {
		time.Sleep(time.Hour)
	}
}
