// Package bare is a process of bare whatsmeow clients: the lowest possible cost of a session and
// of a message, with which benchmarks compare a worker.
package bare

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver that the product uses too
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"go.mau.fi/whatsmeow/types/events"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	_ "modernc.org/sqlite" // the same

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// Phones begins the numbers of the bare clients.
const Phones = "3462"

const (
	// connections is how many connections to PostgreSQL the clients share, as many as a worker.
	connections = 8
	// logins is how many clients connect in a second, as many as in a worker.
	logins = 200
	// pairings is how many clients pair at the same time, each for at most pairTimeout.
	pairings    = 20
	pairTimeout = 2 * time.Minute
)

// Options are the flags of the process.
type Options struct {
	// Database is the URL of a PostgreSQL database, or the path of a SQLite file.
	Database string
	// Endpoint, Root and Control are those of the simulator.
	Endpoint, Root, Control string
	// Pair is how many devices to link; 0: the process connects those that are linked, the first
	// Connect of them or, if that is 0, all.
	Pair, Connect int
}

// Flags registers the flags of the process. Without -bare-database a program is not this process.
func Flags(f *flag.FlagSet) *Options {
	o := &Options{}
	f.StringVar(&o.Database, "bare-database", "", "")
	f.StringVar(&o.Endpoint, "bare-endpoint", "", "")
	f.StringVar(&o.Root, "bare-root", "", "")
	f.StringVar(&o.Control, "bare-control", "", "")
	f.IntVar(&o.Pair, "bare-pair", 0, "")
	f.IntVar(&o.Connect, "bare-connect", 0, "")
	return o
}

// Args are the flags with these values.
func (o Options) Args() []string {
	return []string{
		"-bare-database=" + o.Database, "-bare-endpoint=" + o.Endpoint, "-bare-root=" + o.Root, "-bare-control=" + o.Control,
		fmt.Sprintf("-bare-pair=%d", o.Pair), fmt.Sprintf("-bare-connect=%d", o.Connect),
	}
}

// Run is the process: whatsmeow as its documentation shows it, and nothing else. With Pair it
// links that many devices and ends; without, it connects devices of the database and runs until
// ctx ends.
func Run(ctx context.Context, o Options) error {
	root, err := hex.DecodeString(o.Root)
	if err != nil || len(root) != len(whatsmeow.WACertPubKey) {
		return errors.New("-bare-root is not a key in hex")
	}
	copy(whatsmeow.WACertPubKey[:], root)
	target, err := url.Parse(o.Endpoint)
	if err != nil {
		return fmt.Errorf("-bare-endpoint: %w", err)
	}
	db, dialect, err := open(o.Database)
	if err != nil {
		return fmt.Errorf("opening the database: %w", err)
	}
	defer func() { _ = db.Close() }()
	container := sqlstore.NewWithDB(db, dialect, nil)
	if err := container.Upgrade(ctx); err != nil {
		return fmt.Errorf("making the tables: %w", err)
	}
	web := &http.Client{Transport: redirect{target}, Timeout: time.Minute}
	client := func(device *store.Device) *whatsmeow.Client {
		c := whatsmeow.NewClient(device, nil)
		c.SetPreLoginHTTPClient(web)
		c.SetWebsocketHTTPClient(web)
		c.SetMediaHTTPClient(web)
		return c
	}
	if o.Pair > 0 {
		return pair(ctx, o, container, client)
	}
	return connect(ctx, o, container, client)
}

// open opens a database with the settings of the product.
func open(database string) (db *sql.DB, dialect string, err error) {
	if !strings.HasPrefix(database, "postgres://") {
		db, err = sql.Open("sqlite", "file:"+database+"?_pragma=foreign_keys(1)&_pragma=journal_mode(WAL)&_pragma=synchronous(NORMAL)&_pragma=busy_timeout(10000)&_txlock=immediate")
		return db, "sqlite", err
	}
	if db, err = sql.Open("pgx", database); err != nil {
		return nil, "", err
	}
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db, "postgres", nil
}

func connect(ctx context.Context, o Options, container *sqlstore.Container, client func(*store.Device) *whatsmeow.Client) error {
	devices, err := container.GetAllDevices(ctx)
	if err != nil {
		return fmt.Errorf("reading the devices: %w", err)
	}
	if o.Connect > 0 {
		devices = devices[:min(o.Connect, len(devices))]
	}
	pace := rate.NewLimiter(logins, logins)
	clients := make([]*whatsmeow.Client, 0, len(devices))
	for _, device := range devices {
		if err := pace.Wait(ctx); err != nil {
			return fmt.Errorf("pacing: %w", err)
		}
		c := client(device)
		if err := c.Connect(); err != nil {
			return fmt.Errorf("connecting: %w", err)
		}
		clients = append(clients, c)
	}
	<-ctx.Done()
	for _, c := range clients {
		c.Disconnect()
	}
	return nil
}

func pair(ctx context.Context, o Options, container *sqlstore.Container, client func(*store.Device) *whatsmeow.Client) error {
	control := simulator.Control{URL: o.Control}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(pairings)
	for i := range o.Pair {
		group.Go(func() error {
			c := client(container.NewDevice())
			done := make(chan error, 2)
			c.AddEventHandler(func(event any) {
				switch e := event.(type) {
				case *events.QR:
					go func() {
						if _, err := control.Scan(ctx, e.Codes[0], fmt.Sprintf("+%s%07d", Phones, i)); err != nil {
							done <- err
						}
					}()
				case *events.Connected:
					done <- nil
				}
			})
			if err := c.Connect(); err != nil {
				return fmt.Errorf("connecting: %w", err)
			}
			defer c.Disconnect()
			pairing, cancel := context.WithTimeout(ctx, pairTimeout)
			defer cancel()
			select {
			case err := <-done:
				return err
			case <-pairing.Done():
				return fmt.Errorf("a client did not pair within %s: %w", pairTimeout, pairing.Err())
			}
		})
	}
	return group.Wait()
}

// redirect sends WhatsApp's requests to the simulator.
type redirect struct{ to *url.URL }

// RoundTrip implements http.RoundTripper.
func (e redirect) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Host = r.URL.Host
	r.URL.Host = e.to.Host
	r.URL.Scheme = map[string]string{"ws": "http", "wss": "https"}[e.to.Scheme]
	return http.DefaultTransport.RoundTrip(r)
}
