// The backend's side of sse-server in Go, with x/crypto and msgpack/v5. It needs SSE_SECRET, PORT, and
// PUSH_URL, where this backend reaches the server (http://127.0.0.1:8000), PUSH_PUBLIC_URL, where browsers do.
package main

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"github.com/vmihailenco/msgpack/v5"
	"golang.org/x/crypto/chacha20poly1305"
	"io"
	"math/big"
	"net/http"
	"os"
	"strings"
	"time"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// A Branca token: XChaCha20-Poly1305 in base62, under the first of the secrets.
func mint(name string, value any) string {
	key, nonce := make([]byte, 32), make([]byte, 24)
	must(fmt.Sscanf(os.Getenv("SSE_SECRET"), "%64x", &key)) // 64 digits stand for 32 bytes
	must(rand.Read(nonce))
	head := append(binary.BigEndian.AppendUint32([]byte{0xBA}, uint32(time.Now().Unix())), nonce...)
	raw := must(chacha20poly1305.NewX(key)).Seal(head, nonce, must(msgpack.Marshal(map[string]any{name: value})), head)
	capitalsFirst := func(digit rune) rune { return digit ^ digit&64>>1 } // as Branca has them, not Go
	return strings.Map(capitalsFirst, new(big.Int).SetBytes(raw).Text(62))
}

// Delivers all of the events, in order, or none.
func publish(events ...map[string]string) error {
	client := http.Client{Timeout: 5 * time.Second} // all share their connections
	answer, err := client.Post(os.Getenv("PUSH_URL")+"/submit", "", strings.NewReader(mint("events", events)))
	if err == nil {
		defer answer.Body.Close()
		if why, _ := io.ReadAll(answer.Body); answer.StatusCode != 200 {
			return fmt.Errorf("%s: %s", answer.Status, why)
		}
	}
	return err
}

func main() {
	http.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) { // check here who asks
		http.Redirect(w, r, os.Getenv("PUSH_PUBLIC_URL")+"/events?token="+mint("topics", []string{"news"}), 307)
	})
	http.HandleFunc("/news", func(w http.ResponseWriter, r *http.Request) { // in yours, only for POST
		if err := publish(map[string]string{"topic": "news", "data": string(must(io.ReadAll(r.Body)))}); err != nil {
			http.Error(w, "not published: "+err.Error(), 502)
		}
	})
	panic(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}
