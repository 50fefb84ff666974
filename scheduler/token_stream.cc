#include <algorithm>
#include <iterator>
#include <utility>

#include "scheduler/request.h"

namespace godwit {
namespace {

void Merge(TokenEvent event, std::vector<TokenEvent>& events) {
  if (event.kind == TokenEvent::Kind::kTokens) {
    const auto same = std::find_if(events.rbegin(), events.rend(), [&](const TokenEvent& other) {
      return other.kind == event.kind && other.output_index == event.output_index;
    });
    if (same != events.rend()) {
      same->tokens.insert(same->tokens.end(), std::make_move_iterator(event.tokens.begin()),
                          std::make_move_iterator(event.tokens.end()));
      same->times.insert(same->times.end(), event.times.begin(), event.times.end());
      return;
    }
  }
  events.push_back(std::move(event));
}

}  // namespace

void TokenStream::Push(std::vector<TokenEvent> events) {
  if (events.empty()) return;
  bool was_empty = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    was_empty = events_.empty();
    for (TokenEvent& event : events) Merge(std::move(event), events_);
  }
  if (was_empty && notify_) notify_();
}

std::vector<TokenEvent> TokenStream::Drain() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(events_, {});
}

}  // namespace godwit
