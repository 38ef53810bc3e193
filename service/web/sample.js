// A small task that is there to try the service with: which department a customer's message belongs to.

const MESSAGES = {
  billing: [
    "I was charged twice for my subscription this month.",
    "Why does my invoice show a fee that nobody told me about?",
    "Please send me a receipt for the payment of 3 May.",
    "My card was declined although there is enough money on it.",
    "Can I pay by bank transfer instead of by card?",
    "The discount code was not taken off the total.",
    "I cancelled in March and you still take money from my account.",
    "How do I change the address on my invoices?",
    "Your price went up by ten euros without notice.",
    "I need a VAT invoice for my company.",
    "The yearly plan was billed although I chose the monthly one.",
    "When will the amount be debited from my account?",
    "I would like to switch to the cheaper plan from next month.",
    "My payment is marked as overdue, but I paid last week.",
    "Could I pay this in three instalments?",
    "The currency on my bill is wrong.",
    "Which credit cards do you accept?",
    "Somebody used my card to pay for an order that I did not place.",
  ],
  delivery: [
    "My parcel has been stuck in the same depot for a week.",
    "The courier says nobody was home, but I was here all day.",
    "Can you tell me when the package will arrive?",
    "The tracking number does not work.",
    "I gave the wrong street; can the driver be told?",
    "Half of the boxes came today, where are the others?",
    "Do you ship to Norway?",
    "The parcel was left in the rain in front of the door.",
    "Please leave the package with my neighbour.",
    "Express shipping was promised for Tuesday and it is Friday.",
    "How much is shipping for a heavy item?",
    "The order says delivered, yet there is nothing here.",
    "Can I pick up the order at a shop instead?",
    "The carrier lost my shipment.",
    "I will be on holiday; please send it a week later.",
    "The van went past my house without stopping.",
    "Will the sofa be carried up to the third floor?",
    "My tracking page has not changed since Monday.",
  ],
  returns: [
    "The shoes are too small and I want to send them back.",
    "I changed my mind; how do I return the lamp?",
    "You sent me a blue shirt, I ordered a green one. I want to swap it.",
    "How long do I have to send an item back?",
    "Please send me a return label.",
    "I sent the jacket back two weeks ago and have no refund yet.",
    "The plates came broken and I would like replacements.",
    "Can I exchange this for a larger size?",
    "Do I have to pay for sending it back?",
    "I opened the box; can I still return it?",
    "The dress looks nothing like the picture and I do not want to keep it.",
    "Where do I drop off a return?",
    "I lost the slip that goes into the return parcel.",
    "It was a gift and I already have one; can I give it back?",
    "I want my money back, the curtains are the wrong length.",
    "Can I return only one of the three items?",
    "You refused my return although it was in time.",
    "The chair does not suit the room, please take it back.",
  ],
  technical: [
    "The app crashes each time I open the settings.",
    "I cannot log in since the last update.",
    "The headset does not connect to my phone.",
    "How do I reset my password?",
    "The page stays white in Firefox.",
    "My device shows error 504 and restarts.",
    "The confirmation code never reaches my phone.",
    "Videos stop after a few seconds.",
    "The printer is not found on my network.",
    "After the update the battery is empty within an hour.",
    "How can I move my data to a new computer?",
    "The search finds nothing, whatever I type.",
    "The export button does nothing when I press it.",
    "Bluetooth switches itself off again and again.",
    "I get no notifications on my tablet.",
    "The screen flickers when I plug in the charger.",
    "Synchronisation hangs at 99 percent.",
    "The camera stays black in video calls.",
  ],
};

/** @returns {string} the task as JSONL, departments in turn. */
export function sample() {
  const departments = Object.keys(MESSAGES);
  const choices = departments.map((name) => ` ${name}`);
  const lines = [];
  for (let i = 0; i < MESSAGES.billing.length; i++) {
    for (const name of departments) {
      const prompt = `Customer: ${MESSAGES[name][i]}\nDepartment:`;
      lines.push(JSON.stringify({ prompt, completion: ` ${name}`, choices }));
    }
  }
  return lines.join("\n");
}
