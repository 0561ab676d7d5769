// Asks the passkey of a WhatsApp account for the answer that whatsapp-operator needs to link
// it. A passkey answers only on WhatsApp's own page, so this runs on https://web.whatsapp.com:
// as the extension in this folder, or pasted into the console of that page. It sends
// nothing anywhere: the request is pasted in, the answer is copied out.
(() => {
  "use strict";
  const panelID = "whatsapp-operator-passkey-helper";
  const mostRequest = 8192; // characters; the bound of status.passkey.requestOptions
  // The sites whose passkeys this page may ask, which are those that the operator shows. A
  // request without a site is for the page itself.
  const sites = [undefined, "", "whatsapp.com", "web.whatsapp.com"];

  if (location.origin !== "https://web.whatsapp.com") {
    alert("Open https://web.whatsapp.com in this tab first: the passkey answers only there.");
    return;
  }
  document.getElementById(panelID)?.remove();

  const element = (tag, text, style) => {
    const e = document.createElement(tag);
    e.textContent = text;
    Object.assign(e.style, { font: "14px sans-serif", color: "#111", ...style });
    return e;
  };
  const area = (label, id) => {
    const a = element("textarea", "", { width: "100%", height: "6em", boxSizing: "border-box", background: "#fff", font: "12px monospace" });
    a.setAttribute("aria-label", label);
    a.id = panelID + id;
    a.spellcheck = false;
    return a;
  };
  const button = (text, id, onClick) => {
    const b = element("button", text, { padding: "6px 12px", margin: "6px 6px 6px 0", border: "1px solid #888", borderRadius: "4px", background: "#eee" });
    b.id = panelID + id;
    b.addEventListener("click", onClick);
    return b;
  };

  // read returns the options of the request, or throws an error that says what to change.
  const read = (text) => {
    const trimmed = text.trim();
    if (trimmed === "") throw new Error("Paste the request: the text of status.passkey.requestOptions.");
    if (trimmed.length > mostRequest) throw new Error("The request is longer than " + mostRequest + " characters: it is not one of whatsapp-operator.");
    let options;
    try {
      options = JSON.parse(trimmed, (_, value) => (value === null ? undefined : value));
    } catch (e) {
      throw new Error("The request is not complete JSON (" + e.message + "): copy status.passkey.requestOptions again, from the first brace to the last.");
    }
    if (typeof options !== "object" || typeof options.challenge !== "string") {
      throw new Error("The request has no challenge: copy the text of status.passkey.requestOptions.");
    }
    if (!sites.includes(options.rpId)) throw new Error("The request is for " + JSON.stringify(options.rpId) + ", not for whatsapp.com.");
    if (options.rpId === "") delete options.rpId;
    if (!window.PublicKeyCredential?.parseRequestOptionsFromJSON) {
      throw new Error("This browser is too old: use Chrome 129, Firefox 128, Safari 18.4 or newer.");
    }
    return PublicKeyCredential.parseRequestOptionsFromJSON(options);
  };

  const ask = async () => {
    answer.value = "";
    say("Waiting for the passkey ...");
    try {
      const credential = await navigator.credentials.get({ publicKey: read(request.value) });
      answer.value = JSON.stringify(credential.toJSON());
      say("Copy the answer and give it to the operator as the annotation whatsapp-operator.io/passkey-response.");
    } catch (e) {
      say(e.name === "NotAllowedError" ? "The passkey gave no answer: it was cancelled, took too long, or is not known here. Try again, and choose the phone whose account is linked." : e.message);
    }
  };
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(answer.value);
      say("The answer is in the clipboard.");
    } catch {
      answer.select();
      say("Copy the selected text.");
    }
  };

  const panel = element("div", "", {
    position: "fixed", top: "16px", right: "16px", width: "420px", padding: "12px", zIndex: "2147483647",
    background: "#fff", border: "2px solid #128c7e", borderRadius: "8px", boxShadow: "0 4px 16px rgba(0,0,0,.3)",
  });
  panel.id = panelID;
  const request = area("passkey request", "-request");
  const answer = area("answer of the passkey", "-answer");
  answer.readOnly = true;
  const status = element("p", "", { margin: "6px 0" });
  status.id = panelID + "-status";
  status.setAttribute("role", "status");
  const say = (text) => { status.textContent = text; };
  panel.append(
    element("b", "whatsapp-operator: passkey"),
    element("p", "1. Paste the request of the session (status.passkey.requestOptions).", { margin: "6px 0" }),
    request,
    button("2. Ask the passkey", "-ask", ask),
    answer,
    button("3. Copy the answer", "-copy", copy),
    button("Close", "-close", () => panel.remove()),
    status,
  );
  document.body.append(panel);
  request.focus();
})();
