// Says what Istio's CNI plugin makes of pods, by the plugin's own code.
//
// Reads lines {"name": NAME, "pod": POD}, where POD is a v1 Pod as the API server has it, and answers each with
//
//	{"name": NAME, "verdict": "out"}                     left alone, the pod starts
//	{"name": NAME, "verdict": "refused", "why": TEXT}    the plugin fails, the pod does not start
//	{"name": NAME, "verdict": "redirected", "redirect": FIELDS}
//
// where FIELDS are those of the plugin's Redirect, after a line {"istio": VERSION}. CmdAdd is what the container
// runtime calls: here it finds the pod at an API server of ours, and writes the rules to a file. It enters the network
// namespace that it is in already, which takes root.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"istio.io/istio/cni/pkg/constants"
	"istio.io/istio/cni/pkg/plugin"
	"istio.io/istio/tools/common/config"
	"istio.io/istio/tools/istio-iptables/pkg/dependencies"
	corev1 "k8s.io/api/core/v1"
)

const namespace, pod = "corpus", "pod"

type question struct {
	Name string          `json:"name"`
	Pod  json.RawMessage `json:"pod"`
}

type answer struct {
	Name     string         `json:"name"`
	Verdict  string         `json:"verdict"`
	Why      string         `json:"why,omitempty"`
	Redirect map[string]any `json:"redirect,omitempty"`
}

func main() {
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatalf("istio-verdicts: %v", err)
	}
}

func run() error {
	dir, err := os.MkdirTemp("", "istio-verdicts")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	var asked json.RawMessage
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/namespaces/"+namespace+"/pods/"+pod {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(asked)
	}))
	defer server.Close()
	kubeconfig := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: c,
contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u}],
clusters: [{name: c, cluster: {server: %q}}]}`, server.URL)
	if err := os.WriteFile(filepath.Join(dir, constants.CNIPluginKubeconfName), []byte(kubeconfig), 0o600); err != nil {
		return err
	}
	// Which families are captured is up to the namespace, and no part of the verdict.
	config.LocalIPAddrs = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.IPv4(10, 0, 0, 7), Mask: net.CIDRMask(24, 32)}}, nil
	}
	rules := filepath.Join(dir, "rules")
	os.Setenv(dependencies.DryRunFilePath.Name, rules)

	// The plugin prints its result to where the answers are to go.
	answers := json.NewEncoder(os.Stdout)
	answers.SetEscapeHTML(false)
	if os.Stdout, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
		return err
	}
	if err := answers.Encode(map[string]string{"istio": version()}); err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		var q question
		if err := json.Unmarshal(lines.Bytes(), &q); err != nil {
			return fmt.Errorf("%s: %w", lines.Text(), err)
		}
		asked = q.Pod
		if err := answers.Encode(judge(q, dir, rules)); err != nil {
			return err
		}
	}
	return lines.Err()
}

func judge(q question, dir, rules string) answer {
	refused := func(why error) answer { return answer{Name: q.Name, Verdict: "refused", Why: why.Error()} }
	os.Remove(rules)
	stdin := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "n", "type": "istio-cni", "cni_agent_run_dir": %q,
"plugin_log_level": "fatal", "prevResult": {"cniVersion": "1.0.0"}}`, dir)
	err := plugin.CmdAdd(&skel.CmdArgs{
		ContainerID: "c",
		Netns:       "/proc/self/ns/net",
		IfName:      "eth0",
		Args:        "K8S_POD_NAMESPACE=" + namespace + ";K8S_POD_NAME=" + pod,
		StdinData:   []byte(stdin),
	})
	if err != nil {
		return refused(err)
	}
	text, err := os.ReadFile(rules)
	if os.IsNotExist(err) {
		return answer{Name: q.Name, Verdict: "out"}
	} else if err != nil {
		return refused(err)
	}
	if err := loadable(string(text)); err != nil {
		return refused(err)
	}
	var p corev1.Pod
	if err := json.Unmarshal(q.Pod, &p); err != nil {
		return refused(err)
	}
	redirect, err := plugin.NewRedirect(plugin.ExtractPodInfo(&p))
	if err != nil {
		return refused(err)
	}
	return answer{Name: q.Name, Verdict: "redirected", Redirect: fields(redirect)}
}

// iptables-restore would refuse a port or an owner that is no number; a dry run takes any.
func loadable(rules string) error {
	words := strings.Fields(rules)
	for i, word := range words[:max(len(words)-1, 0)] {
		bits := map[string]int{"--dport": 16, "--uid-owner": 32, "--gid-owner": 32}[word]
		if bits == 0 {
			continue
		}
		if _, err := strconv.ParseUint(words[i+1], 10, bits); err != nil {
			return fmt.Errorf("iptables-restore: %s %s", word, words[i+1])
		}
	}
	return nil
}

func fields(redirect *plugin.Redirect) map[string]any {
	all := map[string]any{}
	value := reflect.ValueOf(*redirect)
	for i := range value.NumField() {
		field := value.Field(i)
		if name := value.Type().Field(i).Name; field.Kind() == reflect.Bool {
			all[name] = field.Bool()
		} else {
			all[name] = field.String()
		}
	}
	return all
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == "istio.io/istio" {
				return dep.Version
			}
		}
	}
	return "unknown"
}
