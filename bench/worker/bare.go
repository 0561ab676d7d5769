package main

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"go.mau.fi/whatsmeow/types/events"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	_ "modernc.org/sqlite" // the driver that the product uses too

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// bareOptions are the flags of the bare process.
type bareOptions struct {
	database, endpoint, root, control string
	// pair is how many devices to link; connect is how many to connect, 0: all.
	pair, connect int
}

// runBare has the lowest possible cost: whatsmeow as its documentation shows it, and nothing
// else. With pair it links that many devices and ends; without, it connects the devices of
// the database and runs until it gets a signal to end.
func runBare(ctx context.Context, o bareOptions) error {
	root, err := hex.DecodeString(o.root)
	if err != nil || len(root) != len(whatsmeow.WACertPubKey) {
		return errors.New("-bare-root is not a key in hex")
	}
	copy(whatsmeow.WACertPubKey[:], root)
	target, err := url.Parse(o.endpoint)
	if err != nil {
		return fmt.Errorf("-bare-endpoint: %w", err)
	}
	db, err := sql.Open("sqlite", "file:"+o.database+"?_pragma=foreign_keys(1)&_pragma=journal_mode(WAL)&_pragma=synchronous(NORMAL)&_pragma=busy_timeout(10000)&_txlock=immediate")
	if err != nil {
		return fmt.Errorf("opening the database: %w", err)
	}
	defer func() { _ = db.Close() }()
	container := sqlstore.NewWithDB(db, "sqlite", nil)
	if err := container.Upgrade(ctx); err != nil {
		return fmt.Errorf("making the tables: %w", err)
	}
	web := &http.Client{Transport: redirect{target}, Timeout: time.Minute}
	connect := func(device *store.Device) *whatsmeow.Client {
		c := whatsmeow.NewClient(device, nil)
		c.SetPreLoginHTTPClient(web)
		c.SetWebsocketHTTPClient(web)
		c.SetMediaHTTPClient(web)
		return c
	}
	if o.pair > 0 {
		return pairBare(ctx, o, container, connect)
	}
	devices, err := container.GetAllDevices(ctx)
	if err != nil {
		return fmt.Errorf("reading the devices: %w", err)
	}
	if o.connect > 0 {
		devices = devices[:min(o.connect, len(devices))]
	}
	pace := rate.NewLimiter(200, 200) // the pace of the worker
	clients := make([]*whatsmeow.Client, 0, len(devices))
	for _, device := range devices {
		if err := pace.Wait(ctx); err != nil {
			return fmt.Errorf("pacing: %w", err)
		}
		c := connect(device)
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

func pairBare(ctx context.Context, o bareOptions, container *sqlstore.Container, connect func(*store.Device) *whatsmeow.Client) error {
	control := simulator.Control{URL: o.control}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(20)
	for i := range o.pair {
		group.Go(func() error {
			c := connect(container.NewDevice())
			done := make(chan error, 1)
			c.AddEventHandler(func(event any) {
				switch e := event.(type) {
				case *events.QR:
					go func() {
						if _, err := control.Scan(ctx, e.Codes[0], fmt.Sprintf("+3462%07d", i)); err != nil {
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
			pairing, cancel := context.WithTimeout(ctx, 2*time.Minute)
			defer cancel()
			select {
			case err := <-done:
				return err
			case <-pairing.Done():
				return fmt.Errorf("a client did not pair within two minutes: %w", pairing.Err())
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
