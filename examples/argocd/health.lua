-- Health of a WhatsAppSession for Argo CD, which does not read conditions by itself.
-- argocd-cm.yaml has the same text. A session that waits for a person (a scan, the end of a
-- suspension) is Suspended: Progressing would block a sync for ever, Degraded would fail it.
local healths = {
  Pending = "Progressing",
  Connecting = "Progressing",
  Disconnected = "Progressing",
  Terminating = "Progressing",
  Connected = "Healthy",
  Pairing = "Suspended",
  PairingExpired = "Suspended",
  Suspended = "Suspended",
  LoggedOut = "Degraded",
  Banned = "Degraded",
  Outdated = "Degraded",
  Replaced = "Degraded",
  Failed = "Degraded",
}

if obj.status == nil or obj.status.phase == nil then
  return {status = "Progressing", message = "Waiting for the manager to see the session"}
end
if obj.status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "Waiting for the manager to see the change"}
end

local conditions = {}
for _, condition in ipairs(obj.status.conditions or {}) do
  conditions[condition.type] = condition
end
-- A suspended session has no condition Ready.
local about = conditions.Ready or conditions.Placed or {reason = obj.status.phase, message = ""}
local message = about.reason
if about.message ~= nil and about.message ~= "" then
  message = about.reason .. ": " .. about.message
end

local status = healths[obj.status.phase] or "Unknown"
-- Also a phase that usually ends by itself needs a person now (quarantine, an id that is taken).
if status == "Progressing" and conditions.Stalled ~= nil and conditions.Stalled.status == "True" then
  status = "Degraded"
end
-- The worker is silent, and whether the session is connected is not known.
if conditions.Ready ~= nil and conditions.Ready.status == "Unknown" then
  status = "Progressing"
end
return {status = status, message = message}
