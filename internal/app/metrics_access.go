package app

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/go-logr/logr"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/util/cache"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

const (
	// How long the API server's answers are used again, as Kubernetes' own components do.
	accessAllowedFor = time.Minute
	accessDeniedFor  = 30 * time.Second
	// accessAnswers bounds how many of them are kept.
	accessAnswers = 1024
	// accessTimeout bounds one question to the API server.
	accessTimeout = 10 * time.Second
)

// metricsAccess lets those read the metrics whose bearer token the API server knows
// (TokenReview), and whom it allows to get the path (SubjectAccessReview). It does what
// controller-runtime's filters.WithAuthenticationAndAuthorization does, with the same rights
// and the same answers. That one imports k8s.io/apiserver, which adds 28 MB to the binary and,
// by its initialisation alone, 17 MB to the memory of every worker, whose metrics it never
// serves.
type metricsAccess struct {
	client client.Client
	log    logr.Logger
	// answers are HTTP statuses, by the hash of the token, the method and the path.
	answers *cache.LRUExpireCache
}

// filterMetrics returns the filter for the metrics server.
func (d *dependencies) filterMetrics(*rest.Config, *http.Client) (metricsserver.Filter, error) {
	return func(log logr.Logger, handler http.Handler) (http.Handler, error) {
		a := &metricsAccess{client: d.direct, log: log, answers: cache.NewLRUExpireCache(accessAnswers)}
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if status := a.check(r); status != http.StatusOK {
				http.Error(w, http.StatusText(status), status)
				return
			}
			handler.ServeHTTP(w, r)
		}), nil
	}, nil
}

// check returns the status of the answer to a request; 200: it may read the metrics.
func (a *metricsAccess) check(r *http.Request) (status int) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	token = strings.TrimSpace(token)
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		return http.StatusUnauthorized
	}
	verb := strings.ToLower(r.Method)
	key := fmt.Sprintf("%x %s %s", sha256.Sum256([]byte(token)), verb, r.URL.Path)
	if known, found := a.answers.Get(key); found {
		return known.(int)
	}
	status, err := a.ask(r.Context(), token, verb, r.URL.Path)
	if err != nil {
		a.log.Error(err, "Failed to ask the API server who may read the metrics")
		return http.StatusInternalServerError
	}
	validity := accessDeniedFor
	if status == http.StatusOK {
		validity = accessAllowedFor
	}
	a.answers.Add(key, status, validity)
	return status
}

func (a *metricsAccess) ask(ctx context.Context, token, verb, path string) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, accessTimeout)
	defer cancel()
	identity := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}
	if err := a.client.Create(ctx, identity); err != nil {
		return 0, fmt.Errorf("reviewing a token: %w", err)
	}
	if !identity.Status.Authenticated {
		return http.StatusUnauthorized, nil
	}
	user := identity.Status.User
	access := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: user.Username, UID: user.UID, Groups: user.Groups, Extra: map[string]authorizationv1.ExtraValue{},
		NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: path, Verb: verb},
	}}
	for key, values := range user.Extra {
		access.Spec.Extra[key] = authorizationv1.ExtraValue(values)
	}
	if err := a.client.Create(ctx, access); err != nil {
		return 0, fmt.Errorf("reviewing the access of %s: %w", user.Username, err)
	}
	if !access.Status.Allowed {
		return http.StatusForbidden, nil
	}
	return http.StatusOK, nil
}
