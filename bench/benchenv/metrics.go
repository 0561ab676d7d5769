package benchenv

import (
	"context"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"k8s.io/client-go/rest"
)

// Metrics are the metrics of a process by name.
type Metrics map[string]*dto.MetricFamily

// Labels select metrics: each of these labels must have its value.
type Labels map[string]string

// Metrics reads the process's metrics as soon as it answers.
func (p *Process) Metrics(ctx context.Context) (Metrics, error) {
	for deadline := time.Now().Add(time.Minute); ; {
		m, err := get(ctx, http.DefaultClient, "http://"+p.metrics+"/metrics")
		if err == nil || time.Now().After(deadline) {
			return m, err
		}
		if err := p.Running(); err != nil {
			return nil, err
		}
		if err := Pause(ctx, 100*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// APIServer reads the metrics of the API server.
func (e *Environment) APIServer() (Metrics, error) {
	httpClient, err := rest.HTTPClientFor(e.Config)
	if err != nil {
		return nil, fmt.Errorf("connecting to the API server: %w", err)
	}
	url, _, err := rest.DefaultServerUrlFor(e.Config)
	if err != nil {
		return nil, fmt.Errorf("connecting to the API server: %w", err)
	}
	return get(e.ctx, httpClient, url.JoinPath("metrics").String())
}

func get(ctx context.Context, client *http.Client, url string) (Metrics, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("reading metrics: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("reading metrics: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("reading metrics: %s", resp.Status)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	m, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("reading metrics: %w", err)
	}
	return m, nil
}

func (m Metrics) each(name string, match Labels, f func(*dto.Metric)) {
	for _, metric := range m[name].GetMetric() {
		fits := 0
		for _, pair := range metric.GetLabel() {
			if wanted, ok := match[pair.GetName()]; ok && wanted == pair.GetValue() {
				fits++
			}
		}
		if fits == len(match) {
			f(metric)
		}
	}
}

// Sum adds up the counters, gauges, or counts of a histogram.
func (m Metrics) Sum(name string, match Labels) (sum float64) {
	m.each(name, match, func(metric *dto.Metric) {
		sum += metric.GetCounter().GetValue() + metric.GetGauge().GetValue() + float64(metric.GetHistogram().GetSampleCount())
	})
	return sum
}

// Quantile is the quantile of the observations of a histogram since before, as Prometheus
// computes it: the observations of a bucket are assumed to be spread evenly. An observation
// above the last bucket counts as that bucket's bound.
func (m Metrics) Quantile(q float64, name string, match Labels, before Metrics) float64 {
	counts := map[float64]float64{}
	add := func(sign float64) func(*dto.Metric) {
		return func(metric *dto.Metric) {
			for _, b := range metric.GetHistogram().GetBucket() {
				counts[b.GetUpperBound()] += sign * float64(b.GetCumulativeCount())
			}
			counts[math.Inf(1)] += 0
		}
	}
	m.each(name, match, add(1))
	before.each(name, match, add(-1))
	rank := q * (m.Sum(name, match) - before.Sum(name, match))
	var bounds []float64
	for bound := range counts {
		if !math.IsInf(bound, 1) {
			bounds = append(bounds, bound)
		}
	}
	slices.Sort(bounds)
	lower, below := 0.0, 0.0
	for _, upper := range bounds {
		if here := counts[upper]; here >= rank && here > below {
			return lower + (upper-lower)*(rank-below)/(here-below)
		}
		lower, below = upper, counts[upper]
	}
	return lower
}

// writeVerbs are the API server's verbs of requests that change something.
var writeVerbs = []string{"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"}

// Writes counts the API server's successful writes, except those of Leases.
func (m Metrics) Writes() (sum float64) {
	for _, verb := range writeVerbs {
		m.each("apiserver_request_total", Labels{"verb": verb}, func(metric *dto.Metric) {
			var resource, code string
			for _, pair := range metric.GetLabel() {
				switch pair.GetName() {
				case "resource":
					resource = pair.GetValue()
				case "code":
					code = pair.GetValue()
				}
			}
			if resource != "leases" && code != "" && code[0] == '2' {
				sum += metric.GetCounter().GetValue()
			}
		})
	}
	return sum
}

// PrintRequests prints the number of requests to the API server since before, by verb,
// resource and status, without the rare ones.
func (m Metrics) PrintRequests(before Metrics, rare float64) {
	counts := map[string]float64{}
	count := func(sign float64, from Metrics) {
		from.each("apiserver_request_total", nil, func(metric *dto.Metric) {
			label := map[string]string{}
			for _, pair := range metric.GetLabel() {
				label[pair.GetName()] = pair.GetValue()
			}
			name := label["resource"]
			if label["subresource"] != "" {
				name += "/" + label["subresource"]
			}
			counts[label["verb"]+" "+name+" "+label["code"]] += sign * metric.GetCounter().GetValue()
		})
	}
	count(1, m)
	count(-1, before)
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		if n := counts[name]; n >= rare {
			Print("  %8.0f  %s", n, name)
		}
	}
}
