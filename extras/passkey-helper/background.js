// The page asks the passkey, so the code runs in the page's own world; it does so only when
// a person clicks the button of the extension.
const page = "https://web.whatsapp.com/";

async function openHelper(tab) {
  if (!tab.url || !tab.url.startsWith(page)) {
    await chrome.tabs.create({ url: page });
    return;
  }
  await chrome.scripting.executeScript({ target: { tabId: tab.id }, world: "MAIN", files: ["passkey.js"] });
}

chrome.action.onClicked.addListener(openHelper);
