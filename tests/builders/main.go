// Writes an archive as the builders in Go do (docker, buildah, kaniko, ko, crane): by archive/tar.
//
// Its input is JSON, a list of headers; its output the archive. The caller says the format, or leaves it to the library.
package main

import (
	"archive/tar"
	"bufio"
	"encoding/json"
	"log"
	"os"
	"time"
)

type header struct {
	Name, Type, Link, Format string
	Mode, Seconds, Nanos     int64
	Uid, Gid                 int
	Major, Minor             int64
	Data                     []byte
	Records                  map[string]string
	NoTime                   bool
}

var formats = map[string]tar.Format{"": tar.FormatUnknown, "USTAR": tar.FormatUSTAR, "PAX": tar.FormatPAX, "GNU": tar.FormatGNU}

func main() {
	log.SetFlags(0)
	var headers []header
	if err := json.NewDecoder(os.Stdin).Decode(&headers); err != nil {
		log.Fatal(err)
	}
	out := bufio.NewWriter(os.Stdout)
	archive := tar.NewWriter(out)
	for _, h := range headers {
		entry := &tar.Header{
			Name: h.Name, Typeflag: h.Type[0], Linkname: h.Link, Format: formats[h.Format], Mode: h.Mode,
			Uid: h.Uid, Gid: h.Gid, Devmajor: h.Major, Devminor: h.Minor, Size: int64(len(h.Data)),
			ModTime: time.Unix(h.Seconds, h.Nanos), PAXRecords: h.Records,
		}
		if h.NoTime {
			entry.ModTime = time.Time{} // as ko leaves it
		}
		if err := archive.WriteHeader(entry); err != nil {
			log.Fatalf("%s: %v", h.Name, err)
		}
		if _, err := archive.Write(h.Data); err != nil {
			log.Fatalf("%s: %v", h.Name, err)
		}
	}
	if err := archive.Close(); err != nil {
		log.Fatal(err)
	}
	if err := out.Flush(); err != nil {
		log.Fatal(err)
	}
}
