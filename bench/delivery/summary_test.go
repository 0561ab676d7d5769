package main

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func at(n int) time.Time { return noon.Add(time.Duration(n) * time.Millisecond) }

func status(session string, n int64) key {
	return key{delivery.KindStatus, session, delivery.Numbers{Epoch: 1, Seq: n}}
}

func TestCount(t *testing.T) {
	high := func(k key, happened int) event { return event{k, delivery.High, at(happened)} }
	for _, row := range []struct {
		name     string
		events   []event
		requests []request
		want     summary
	}{
		{"nothing", nil, nil, summary{}},
		{"an arrival", []event{high(status("a", 1), 0)}, []request{{at: at(10), kind: delivery.KindStatus, id: "1", items: []key{status("a", 1)}}},
			summary{high: []time.Duration{10 * time.Millisecond}, statusRequests: 1, peak: 1}},
		{"a loss", []event{high(status("a", 1), 0), high(status("b", 1), 0)}, []request{{at: at(10), kind: delivery.KindStatus, id: "1", items: []key{status("a", 1)}}},
			summary{high: []time.Duration{10 * time.Millisecond}, lost: 1, statusRequests: 1, peak: 1}},
		{"the last of a session is lost, an older one arrived", []event{high(status("a", 1), 0), high(status("a", 2), 5)}, []request{{at: at(10), kind: delivery.KindStatus, items: []key{status("a", 1)}}},
			summary{high: []time.Duration{10 * time.Millisecond}, lost: 1, statusRequests: 1, peak: 1}},
		{"one was replaced", []event{high(status("a", 1), 0), high(status("a", 2), 5)}, []request{{at: at(10), kind: delivery.KindStatus, items: []key{status("a", 2)}}},
			summary{high: []time.Duration{5 * time.Millisecond}, coalesced: 1, statusRequests: 1, peak: 1}},
		{"the wrong order", []event{high(status("a", 1), 0), high(status("a", 2), 0)}, []request{
			{at: at(10), kind: delivery.KindStatus, items: []key{status("a", 2)}}, {at: at(20), kind: delivery.KindStatus, items: []key{status("a", 1)}}},
			summary{high: []time.Duration{10 * time.Millisecond, 20 * time.Millisecond}, disordered: 1, statusRequests: 2, peak: 2}},
		{"a batch that is repeated counts once", []event{high(status("a", 1), 0), high(status("a", 2), 0)}, []request{
			{at: at(10), kind: delivery.KindStatus, id: "1", items: []key{status("a", 1)}}, {at: at(20), kind: delivery.KindStatus, id: "2", items: []key{status("a", 2)}},
			{at: at(1200), kind: delivery.KindStatus, id: "1", items: []key{status("a", 1)}}},
			summary{high: []time.Duration{10 * time.Millisecond, 20 * time.Millisecond}, statusRequests: 3, peak: 2}},
	} {
		t.Run(row.name, func(t *testing.T) { NewWithT(t).Expect(count(row.events, row.requests)).To(Equal(row.want)) })
	}
}

func TestPercentile(t *testing.T) {
	g := NewWithT(t)
	var values []time.Duration
	g.Expect(percentile(values, 99)).To(BeZero())
	for i := range 120 {
		values = append(values, time.Duration(i+1))
	}
	g.Expect(percentile(values[:1], 99)).To(BeEquivalentTo(1))
	g.Expect(percentile(values[:100], 50)).To(BeEquivalentTo(50))
	g.Expect(percentile(values[:100], 99)).To(BeEquivalentTo(99))
	g.Expect(percentile(values, 99)).To(BeEquivalentTo(119))
}

func TestPlan(t *testing.T) {
	g := NewWithT(t)
	c := sideConfig{Sessions: 100, Duration: time.Minute, QRInterval: 30 * time.Second, StatusInterval: time.Minute, Seed: 1}
	events := plan(c)
	g.Expect(plan(c)).To(Equal(events), "the same plan for both sides")
	codes, last := 0, time.Duration(0)
	for _, p := range events {
		g.Expect(p.at).To(BeNumerically(">=", last))
		last = p.at
		if p.kind == delivery.KindQR {
			codes++
		}
	}
	g.Expect(codes).To(Equal(200), "two codes per minute for each session")
}
