package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	"sigs.k8s.io/yaml"
)

const kubeScore = "github.com/zegl/kube-score/cmd/kube-score@v1.20.0"

// scoreException is a finding of kube-score that is as it should be.
type scoreException struct {
	check string
	// object is a part of the object's name; empty: any.
	object string
	// summary is a part of the finding; empty: any.
	summary string
	reason  string
}

var scoreExceptions = []scoreException{
	{"container-resources", "", "CPU limit is not set", "throttling delays heartbeats, and a worker that misses them ends its connections"},
	{"container-image-pull-policy", "", "", "tags of a release are never moved, and a digest can be given; Always would need the registry at each restart"},
	{"container-ephemeral-storage-request-and-limit", "", "", "the root file system is read-only; /tmp and a worker's state take kilobytes, and an eviction would move sessions"},
	{"deployment-has-host-podantiaffinity", "", "", "topologySpreadConstraints spread the pods"},
	{"container-security-context-user-group-id", "postgresql", "", "999 is the user of the official image"},
	{"container-security-context-user-group-id", "valkey", "", "999 is the user of the official image"},
	{"statefulset-has-servicename", "", "", "one pod, which is reached through an ordinary Service of that name: it needs no name of its own"},
	{"deployment-strategy", "simulator", "", "a part of the demo, whose state is in its memory"},
	{"deployment-strategy", "laravel", "", "a part of the demo, whose state is in its memory"},
	{"deployment-replicas", "simulator", "", "a part of the demo, whose state is in its memory"},
	{"deployment-replicas", "laravel", "", "a part of the demo, whose state is in its memory"},
}

// TestKubeScore lets kube-score judge the manifests. What it finds is corrected, or excepted
// here with the reason.
func TestKubeScore(t *testing.T) {
	used := make([]bool, len(scoreExceptions))
	for _, set := range optionSets {
		if set.name != "everything" && set.name != "the demo with network policies" {
			continue
		}
		t.Run(set.name, func(t *testing.T) {
			g := NewWithT(t)
			var manifests bytes.Buffer
			for _, o := range mustRender(t, options{values: set.values(t), apis: set.apis}) {
				content, err := yaml.Marshal(o)
				g.Expect(err).NotTo(HaveOccurred())
				manifests.WriteString("---\n")
				manifests.Write(content)
			}
			cmd := exec.CommandContext(t.Context(), "go", "run", kubeScore, "score", "--output-format=json", "-")
			cmd.Stdin = &manifests
			var problems bytes.Buffer
			cmd.Stderr = &problems
			output, err := cmd.Output()
			if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) { // it fails when it finds something
				t.Fatal(err)
			}
			var scored []struct {
				Object string `json:"object_name"`
				Checks []struct {
					Check    struct{ ID string }
					Grade    int
					Skipped  bool
					Comments []struct{ Path, Summary string }
				}
			}
			if err := json.Unmarshal(output, &scored); err != nil || len(scored) == 0 {
				t.Fatalf("kube-score judged nothing: %v\n%s", err, problems.String())
			}
			for _, object := range scored {
				for _, check := range object.Checks {
					const almost = 7 // the grade of an advice
					if check.Skipped || check.Grade >= almost {
						continue
					}
					for _, comment := range check.Comments {
						excepted := false
						for i, e := range scoreExceptions {
							if e.check == check.Check.ID && strings.Contains(object.Object, e.object) && strings.Contains(comment.Summary, e.summary) {
								excepted, used[i] = true, true
							}
						}
						if !excepted {
							t.Errorf("%s %s: %s (%s)", object.Object, comment.Path, comment.Summary, check.Check.ID)
						}
					}
				}
			}
		})
	}
	for i, e := range scoreExceptions {
		if !used[i] && !t.Failed() {
			t.Errorf("the exception for %s of %q is not needed", e.check, e.object)
		}
	}
}
