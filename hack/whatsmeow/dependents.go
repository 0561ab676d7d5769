package main

// dependents are public modules whose go.mod requires whatsmeow. All of them are released
// often. whatsmeow has no releases: a version that a released program requires is one that
// its authors have tried.
//
// A module belongs here if its go.mod is in the root of its repository, is named like the
// repository, and does not replace whatsmeow by a copy: otherwise the module proxy cannot
// serve it, or its version is not one of whatsmeow's.
var dependents = []string{
	"go.mau.fi/mautrix-whatsapp", // by whatsmeow's own author, released each month
	"go.mau.fi/mautrix-meta",     // by the same author
	"github.com/openclaw/wacli",
	"github.com/sipeed/picoclaw",
	"github.com/hoehermann/purple-gowhatsapp",
}
