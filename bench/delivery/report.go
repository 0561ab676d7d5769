package main

import (
	"fmt"
	"io"
	"math"
	"text/tabwriter"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// figures are all measured values.
type figures struct {
	o                        options
	old, ours, burst, single part
	redisCPU, redisPeak      float64
}

// rounds splits the burst: the n-th update of a session belongs to the n-th round.
func (f *figures) rounds() []summary {
	var all []summary
	for round := range f.o.rounds {
		seq := delivery.FirstSeq(1) + int64(round) + 1
		var events []event
		for _, e := range f.burst.Events {
			if e.Seq == seq {
				events = append(events, e)
			}
		}
		var requests []request
		for _, r := range f.burst.requests {
			if len(r.items) > 0 && r.items[0].Seq == seq {
				requests = append(requests, r)
			}
		}
		all = append(all, count(events, requests))
	}
	return all
}

// flat is the JSON object. Times are in milliseconds, memory in megabytes of a million bytes.
func (f *figures) flat() map[string]any {
	minutes := f.o.duration.Minutes()
	perMinute := func(n int) float64 { return round(float64(n) / minutes) }
	out := map[string]any{
		"sessions": f.o.sessions, "duration_s": round(f.o.duration.Seconds()), "redis_durability": f.ours.Durability,
		"redis_cpu_s": round(f.redisCPU), "redis_peak_memory_mb": round(f.redisPeak / 1e6),
		"urgent_alone_samples": len(f.single.high), "urgent_1000_rounds": f.o.rounds,
		"urgent_alone_p50_ms": ms(percentile(f.single.high, 50)), "urgent_alone_p99_ms": ms(percentile(f.single.high, 99)),
		"lost":       f.ours.lost + f.burst.lost + f.single.lost,
		"disordered": f.ours.disordered + f.burst.disordered + f.single.disordered,
	}
	for prefix, p := range map[string]*part{"": &f.ours, "old_": &f.old} {
		out[prefix+"qr_requests_per_minute"] = perMinute(p.qrRequests)
		out[prefix+"status_requests_per_minute"] = perMinute(p.statusRequests)
		out[prefix+"total_requests_per_minute"] = perMinute(p.qrRequests + p.statusRequests)
		out[prefix+"peak_requests_per_s"] = p.peak
		out[prefix+"events"] = len(p.Events)
		out[prefix+"coalesced"] = p.coalesced
		out[prefix+"bytes"] = p.bytes
		out[prefix+"cpu_s"] = round(p.cpu.Seconds())
		out[prefix+"peak_memory_mb"] = round(float64(p.PeakMemory) / 1e6)
		for name, values := range map[string][]time.Duration{"high": p.high, "normal": p.normal, "qr": p.qr} {
			out[prefix+name+"_p50_ms"], out[prefix+name+"_p99_ms"] = ms(percentile(values, 50)), ms(percentile(values, 99))
		}
	}
	// docs/benchmarks.md compares this name, which means QR codes.
	out["old_requests_per_minute"] = out["old_qr_requests_per_minute"]
	out["old_lost"], out["old_disordered"] = f.old.lost, f.old.disordered
	var p50, p99 time.Duration
	requests := 0
	for _, t := range f.rounds() {
		p50, p99 = max(p50, percentile(t.high, 50)), max(p99, percentile(t.high, 99))
		requests = max(requests, t.qrRequests+t.statusRequests)
	}
	out["urgent_1000_p50_ms"], out["urgent_1000_p99_ms"], out["urgent_1000_requests"] = ms(p50), ms(p99), requests
	return out
}

// report prints the table and writes the file.
func (f *figures) report(w io.Writer) error {
	out := f.flat()
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(what string, old, ours, target any) {
		fmt.Fprintf(table, "%s\t%v\t%v\t%v\n", what, old, ours, target)
	}
	fmt.Fprintln(table)
	row("", "one request per event", "ours", "docs/benchmarks.md")
	row("QR requests per minute", out["old_qr_requests_per_minute"], out["qr_requests_per_minute"], "≤ 44")
	row("status requests per minute", out["old_status_requests_per_minute"], out["status_requests_per_minute"], "")
	row("requests per second at the peak", out["old_peak_requests_per_s"], out["peak_requests_per_s"], "")
	row("urgent status alone, p50 / p99 ms", "", pair(out, "urgent_alone"), "p99 ≤ 25")
	row(fmt.Sprintf("%d urgent at once, p50 / p99 ms", f.o.sessions), "", pair(out, "urgent_1000"), "p99 ≤ 500")
	row(fmt.Sprintf("%d urgent at once, requests", f.o.sessions), "", out["urgent_1000_requests"], "≤ 22")
	row("HIGH among others, p50 / p99 ms", pair(out, "old_high"), pair(out, "high"), "at Laravel within 500")
	row("NORMAL among others, p50 / p99 ms", pair(out, "old_normal"), pair(out, "normal"), "at Laravel within 1000")
	row("QR, p50 / p99 ms", pair(out, "old_qr"), pair(out, "qr"), "")
	row("events", out["old_events"], out["events"], "")
	row("coalesced", out["old_coalesced"], out["coalesced"], "")
	row("lost", out["old_lost"], out["lost"], "0")
	row("order violations", out["old_disordered"], out["disordered"], "0")
	row("bytes sent", out["old_bytes"], out["bytes"], "")
	row("CPU seconds", out["old_cpu_s"], fmt.Sprintf("%v, and Redis %v", out["cpu_s"], out["redis_cpu_s"]), "")
	row("peak memory, MB", out["old_peak_memory_mb"], fmt.Sprintf("%v, and Redis %v", out["peak_memory_mb"], out["redis_peak_memory_mb"]), "")
	if err := table.Flush(); err != nil {
		return fmt.Errorf("printing the table: %w", err)
	}
	fmt.Fprintf(w, "\nMeasured from the event to its arrival. HIGH and NORMAL \"among others\" wait for their windows; the worst of %d rounds of %d counts.\n", f.o.rounds, f.o.sessions)

	if err := benchenv.Write(f.o.out, out); err != nil {
		return err
	}
	fmt.Fprintln(w, "written to", f.o.out)
	return nil
}

func pair(out map[string]any, name string) string {
	return fmt.Sprintf("%v / %v", out[name+"_p50_ms"], out[name+"_p99_ms"])
}

func ms(d time.Duration) float64 { return round(float64(d) / float64(time.Millisecond)) }

// round keeps two digits after the point.
func round(v float64) float64 { return math.Round(v*100) / 100 }
